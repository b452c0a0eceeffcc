"""`python -m pansharp_fast` is `pansharp-fast`."""

from .cli import main

main(prog_name="pansharp-fast")
