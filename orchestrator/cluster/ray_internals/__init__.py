"""Everything that relies on the internals of Ray: private names and undocumented settings.

Nothing else in this package touches them, so a new version of Ray is checked here. Checked on Ray
2.60. docs/workarounds.md lists each workaround with its reason, its gain and the test that fails
without it. There is a module for each part of Ray, so that a program which uses one part does not
import the others: ``core``, ``train``, ``tune``, ``jobs``, and ``settings`` for all of them.
"""
