"""The server's core: settings, plugins, media, tasks, jobs and models. It knows nothing of HTTP."""
