"""What is told about kept rows: events, metrics, a live publisher."""
