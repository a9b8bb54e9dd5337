"""The HTML and Markdown pages: they take plain data and know no model."""
