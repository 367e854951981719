"""One HTML page from the outputs of the other commands. Needs the extra `report`.

In: a folder. Out: a page that loads nothing and runs nothing; files that are broken or foreign are listed on it.
`collect.py` reads the folder, a `*_section.py` makes the blocks of each section, `page.py` renders them, `svg.py`
draws figures; the `*_figures.py` are also for use with matplotlib alone.
Read `build.py` first, then `collect.py`.
"""
