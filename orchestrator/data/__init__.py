"""Rows to padded token batches: template and verbalizer, loading and splitting, batch plans."""
