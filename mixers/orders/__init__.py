"""Token orders: how a mixer of sequences reads a grid."""
