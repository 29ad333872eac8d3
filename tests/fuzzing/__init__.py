"""Damages inputs at random, for as long as is asked, and looks what becomes of them: `make fuzz`."""
