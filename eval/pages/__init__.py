"""Pages of results: figures with matplotlib, HTML with Jinja. Needs the extra ``report``."""
