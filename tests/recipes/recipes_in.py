"""`python -m recipes_in DIRECTORY ARGUMENTS...` is `python -m recipes ARGUMENTS...` in that directory; it is forked."""

import os
import sys

from recipes.__main__ import main

os.chdir(sys.argv.pop(1))
main()
