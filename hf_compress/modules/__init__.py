"""What bytes in memory: packing weights in place by class swap, and the kernels that run them."""
