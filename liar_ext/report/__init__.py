"""The report of a job, as JSON, text, Markdown and HTML."""
