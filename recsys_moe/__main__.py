"""`python -m recsys_moe` is `recsys-moe`."""

import os
import sys

if sys.path[0] == os.getcwd():
    # In a checkout, transformers would take the folder `kernels` for the Hugging Face package of that name.
    del sys.path[0]

from recsys_moe.cli import main

main()
