"""How a block of keys or of values is written in bytes. One file per codec; `Codec` says what each must offer."""

from kvmosaic.codecs.base import Codec, Packed, Part
from kvmosaic.codecs.exact import Exact
from kvmosaic.codecs.nonuniform import Sphere, sphere_levels
from kvmosaic.codecs.rotated import Rotated
from kvmosaic.codecs.sketched import Sketched
from kvmosaic.codecs.split import Split
from kvmosaic.codecs.uniform import Uniform

__all__ = ["Codec", "Exact", "Packed", "Part", "Rotated", "Sketched", "Sphere", "Split", "Uniform", "sphere_levels"]
