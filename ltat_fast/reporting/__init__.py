"""Reports of finished runs: numbers as CSV and Markdown, one self-contained HTML page, and the paper's tables."""
