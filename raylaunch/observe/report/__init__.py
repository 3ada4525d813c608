"""`raylaunch report`: facts of a run (`facts`, `curves`, `cost`, `settings`) → a page (`page`, `timeline`), Markdown, JSON (`data`)."""
