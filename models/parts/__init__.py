"""What backbones are assembled from: blocks, channel mixers, norms, stems, heads."""
