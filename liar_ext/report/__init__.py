"""The report of a job: a row per site, written as JSON and Markdown."""
