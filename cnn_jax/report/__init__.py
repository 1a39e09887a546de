"""HTML reports with charts. A command imports this package only when it writes a report."""
