"""The replication of arXiv 2509.22921: runs, theory on trees, tuning, tables, verdicts, figures. Depends on `cmdp`."""
