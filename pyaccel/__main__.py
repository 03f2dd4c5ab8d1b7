import sys

from pyaccel.cli import main

sys.exit(main())
