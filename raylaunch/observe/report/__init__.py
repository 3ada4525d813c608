"""`raylaunch report`: facts of a run (`gather`, `curves`, `cost`, `settings`) → a page (`page`, `timeline_chart`), Markdown, JSON (`as_json`)."""
