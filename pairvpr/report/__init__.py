"""What people look at after a run: one HTML file, two runs side by side, files that other tools read. No Ray here."""
