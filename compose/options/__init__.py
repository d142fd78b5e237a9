"""The menu of composition methods: every hyper-parameter with its default, range, unit and source. Imports no torch."""
