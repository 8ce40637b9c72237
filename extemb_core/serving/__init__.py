"""Answer clients of OpenAI's API over HTTP: `extemb serve`. Needs the extra `server`."""
