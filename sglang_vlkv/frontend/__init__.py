"""The process that answers HTTP: what requests ask for, and where their reports are found."""
