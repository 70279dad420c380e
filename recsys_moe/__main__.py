"""`python -m recsys_moe` is `recsys-moe`."""

from recsys_moe.cli import main

main()
