"""Report on prepared stories: statistics, vocabulary sizes, report.html, report.json and the dataset card."""
