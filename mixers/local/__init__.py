"""The controls, pooling, convolutions and shifts."""
