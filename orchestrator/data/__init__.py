"""The way from rows to token batches: loading, splitting, template, verbalizer and batch plans."""
