"""Everything that relies on the internals of MLflow: its tables, migrations and loggers.

Nothing else in this package touches them, so a new version of MLflow is checked here. Checked on
MLflow 3.17. docs/workarounds.md lists each workaround with its reason, its gain and the test that
fails without it.
"""
