// A saved page: everything that the viewer asks for stands in the page, but other episodes than the one that is shown.
for (const el of document.querySelectorAll(".vla-saved:not(.vla-browser)")) {
  const data = JSON.parse(el.nextElementSibling.textContent), told = [];
  const shown = {episode: data.episode, key: data.key, place: 0};
  const refusal = "This saved page holds one episode; open the notebook in JupyterLab for the others.";
  viewer.render({el, model: {
    live: false,
    get: (name) => data[name],
    on: (name, tell) => told.push(tell),
    send: (asked) => {
      const answer = !asked.ready && asked.open !== data.key ? {error: refusal, key: asked.open, place: 0} : data.episode ? shown : null;
      if (answer && (asked.ready || asked.open)) told.forEach((tell) => tell(answer, []));
    },
  }});
}
