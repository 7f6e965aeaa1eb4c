"""Tasks of images and clips."""
