"""What data tells about a model: calibration data, observers, and one sequential pass over the blocks."""
