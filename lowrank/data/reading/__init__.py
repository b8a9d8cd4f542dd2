"""From sources to rows: files, tables and streams, and what a row of each format says."""
