"""python -m kvmosaic"""

from kvmosaic.cli import main

main()
