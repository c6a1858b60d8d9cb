"""What is written and drawn: metrics, samples, model cards, tables, curves."""
