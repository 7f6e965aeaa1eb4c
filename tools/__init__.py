"""Tools for developers of mixerzoo, run from a checkout; not shipped."""
