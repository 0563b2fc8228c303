"""The papers' mechanisms as functions of arrays and callables."""
