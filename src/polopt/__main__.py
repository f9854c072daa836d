"""`python -m polopt` is the command line."""

from polopt.cli import main

raise SystemExit(main())
