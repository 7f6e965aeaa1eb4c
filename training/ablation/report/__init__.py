"""The report of an ablation: figures, tables, HTML."""
