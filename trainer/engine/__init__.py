"""DeepSpeed, the optimiser, and how the work is divided over ranks and memory."""
