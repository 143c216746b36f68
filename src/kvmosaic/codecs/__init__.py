"""How a block of keys or of values is written in bytes. One file per codec; `Codec` says what each must offer."""

from kvmosaic.codecs.base import Codec, Packed, Part
from kvmosaic.codecs.coupled import Coupled
from kvmosaic.codecs.exact import Exact
from kvmosaic.codecs.levels import Levels
from kvmosaic.codecs.nonuniform import Sphere, sphere_levels
from kvmosaic.codecs.rotated import Rotated
from kvmosaic.codecs.sketched import Sketched
from kvmosaic.codecs.split import Split
from kvmosaic.codecs.uniform import Uniform

__all__ = [
    "Codec",
    "Coupled",
    "Exact",
    "Levels",
    "Packed",
    "Part",
    "Rotated",
    "Sketched",
    "Sphere",
    "Split",
    "Uniform",
    "sphere_levels",
]
