"""What a run tells: files, bars, pages, trackers; and what ends it early."""
