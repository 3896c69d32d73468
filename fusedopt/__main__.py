"""`python -m fusedopt`: the command `fusedopt`."""

from ._cli import main

main(prog_name="fusedopt")
