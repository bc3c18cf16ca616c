"""DiracX: what becomes of a job is told to its server, its sandboxes are there, and pilots are known to it.

    async with open_diracx(Preferences.load(os.environ)) as diracx, open_reporter(diracx) as reporter:
        async with Node(...) as node:
            ...

Its words stay in this folder and in `loadmaster.dirac`. Takes `pip install 'loadmaster[diracx]'`.
"""
