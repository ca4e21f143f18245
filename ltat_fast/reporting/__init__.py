"""The report of finished runs: numbers as CSV and Markdown, and one self-contained HTML page."""
