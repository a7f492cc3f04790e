"""Before any test is collected: others that import Triton would import it uninterpreted."""

from tests.kernels import interpreter

if interpreter.AVAILABLE:
    interpreter.load_kernels()
