"""The Python interface, ``import orchestrator``: jobs, searches and registered prompts.

Users reach it through the names that ``orchestrator/__init__.py`` lists. The verbs of the command
line share its functions.
"""
