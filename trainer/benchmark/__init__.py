"""The jobs of `bench.py`: what is measured, in processes of their own, and the report."""
