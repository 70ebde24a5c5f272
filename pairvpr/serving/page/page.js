// The service's page: asks with a photo, shows the answer. Texts of the service are set as text, never parsed as HTML.
"use strict";
(() => {
  const TOKEN = "pairvpr.token", RECENT = "pairvpr.recent.1", MOST_RECENT = 12, MOST_ATTEMPTS = 4;
  const ALL = "*"; // the service's name for all of its indices together
  let indices = [];
  let latest = null; // the newest photo, answered or not, for "Ask again"
  let asked = null; // the file and the conditions of the answer that is shown; `file` is null for one of a while ago
  let answer = null;
  let selected = null; // the candidate beside the photo
  let asking = null; // ends the question that is under way
  const pictures = new Map(); // object URLs of photos of the index, by address
  const overlays = new Map(); // where the network looked, by candidate

  // ---- the service ----
  // The response to one request that was not refused. Asks again while the service is too busy for it.
  async function request(address, { body = null, type = null, signal = null } = {}) {
    for (let attempt = 1; ; attempt += 1) {
      const headers = {};
      const token = sessionStorage.getItem(TOKEN);
      if (token) headers.Authorization = `Bearer ${token}`;
      if (type) headers["Content-Type"] = type;
      let response;
      try {
        response = await fetch(address, { method: body === null ? "GET" : "POST", headers, body, signal });
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new Error("The service can't be reached. Is it still running?", { cause: error });
      }
      if (response.ok) return response;
      const message = await reasonOf(response);
      if (response.status === 401 && await askForToken(Boolean(token))) { attempt -= 1; continue; }
      if (response.status !== 503 || attempt === MOST_ATTEMPTS) throw new Error(message);
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      say(`The service is busy. Asking again in ${seconds} s …`);
      await new Promise((done) => { setTimeout(done, 1000 * (seconds + Math.random())); });
      signal?.throwIfAborted();
    }
  }
  async function reasonOf(response) {
    try {
      const { error } = await response.json();
      return error.request_id ? `${error.message} (request ${error.request_id})` : error.message;
    } catch { return `The service answered with status ${response.status}.`; }
  }
  function askForToken(wasWrong) {
    const dialog = byId("token-dialog");
    if (dialog.open) return Promise.resolve(false);
    byId("token-error").textContent = wasWrong ? "The service refused that token." : "";
    dialog.returnValue = "";
    dialog.showModal();
    return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "given"), { once: true }));
  }
  function listenToToken() {
    const dialog = byId("token-dialog");
    byId("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, byId("token").value.trim());
      byId("token").value = "";
      dialog.close("given");
    });
    byId("token-cancel").addEventListener("click", () => dialog.close());
  }

  const say = (text) => { byId("status").textContent = text; };
  function complain(text) {
    byId("problem").hidden = !text;
    byId("problem").textContent = text;
  }

  // ---- indices ----
  async function readIndices() {
    try {
      indices = (await (await request("v1/index")).json()).indices;
    } catch (error) { complain(error.message); return; }
    const label = (its) => `${its.name}: ${its.num_photos.toLocaleString("en")} photos`;
    byId("index").replaceChildren(...indices.map((its) => element("option", { value: its.name }, label(its))));
    if (indices.length > 1) byId("index").append(element("option", { value: ALL }, "all together"));
    byId("index-choice").hidden = indices.length < 2;
    describeIndex();
  }
  function describeIndex() {
    const chosen = indices.filter((its) => byId("index").value === ALL || byId("index").value === its.name);
    const photos = chosen.reduce((sum, its) => sum + its.num_photos, 0);
    const named = ({ model, pair_model }) =>
      model.name === pair_model.name ? model.name : `${model.name}, pairs scored by ${pair_model.name}`;
    const models = [...new Set(chosen.map(named))];
    byId("facts").textContent = `${photos.toLocaleString("en")} photos in the map · model ${models.join(", ")}`;
    byId("filters").hidden = !chosen.some((its) => its.has_positions && its.utm_zone !== null);
  }

  // ---- asking ----
  function conditions() {
    const found = new URLSearchParams();
    if (indices.length > 1) found.set("index", byId("index").value);
    const near = byId("near").value.trim(), radius = byId("radius").value;
    byId("near-error").textContent = "";
    if (byId("filters").hidden || (!near && !radius)) return found;
    const degrees = /^(-?\d+(?:\.\d+)?)\s*[,;\s]\s*(-?\d+(?:\.\d+)?)$/.exec(near);
    if (!degrees || !(Number(radius) > 0)) {
      byId("filters").open = true;
      byId("near-error").textContent = "Expected two numbers, such as 37.7793, -122.4193, and a radius above 0, or neither.";
      byId(degrees ? "radius" : "near").focus();
      return null;
    }
    found.set("near", `${degrees[1]},${degrees[2]}`);
    found.set("radius_m", radius);
    return found;
  }

  async function ask(file) {
    const query = conditions();
    latest = file;
    byId("again").disabled = false;
    if (!query) return;
    asking?.abort();
    const mine = asking = new AbortController();
    document.body.classList.add("busy");
    complain("");
    say(`Asking where ${file.name} was taken …`);
    try {
      const type = file.type || "application/octet-stream";
      const response = await request(`v1/locate?${query}`, { body: file, type, signal: mine.signal });
      const content = await response.json();
      const question = { name: file.name, type, query: query.toString(), thumbnail: await thumbnail(file) };
      if (mine.signal.aborted) return;
      show(content, { ...question, file });
      remember(question, content);
      byId("answer").focus({ preventScroll: true });
      byId("answer").scrollIntoView({ block: "start" });
      say(`Answered in ${content.seconds.total.toFixed(2)} s.`);
    } catch (error) {
      if (mine.signal.aborted) return;
      say("");
      complain(`${file.name}: ${error.message}`);
    } finally {
      if (asking === mine) { asking = null; document.body.classList.remove("busy"); }
    }
  }

  function listenToPhotos() {
    const take = (files) => {
      const [file] = files;
      if (file) ask(file);
    };
    for (const [button, input] of [["choose", "file"], ["take", "camera"]]) {
      byId(button).addEventListener("click", () => byId(input).click());
      byId(input).addEventListener("change", () => { take(byId(input).files); byId(input).value = ""; });
    }
    const again = () => { if (latest) ask(latest); };
    byId("again").addEventListener("click", again);
    for (const name of ["near", "radius"]) byId(name).addEventListener("keydown", (event) => { if (event.key === "Enter") again(); });
    byId("index").addEventListener("change", () => { describeIndex(); again(); });
    addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      take(event.clipboardData.files);
    });
    let depth = 0; // enter and leave come for every element on the way
    const dragging = (change) => { depth = Math.max(0, depth + change); document.body.classList.toggle("dragging", depth > 0); };
    addEventListener("dragenter", (event) => { event.preventDefault(); dragging(1); });
    addEventListener("dragleave", () => dragging(-1));
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      dragging(-depth);
      if (event.dataTransfer.files.length) take(event.dataTransfer.files);
      else complain("That was no file. Drop a photo from your disk, or save the picture first.");
    });
  }

  // ---- the answer ----
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const degrees = (its) => `${its.latitude.toFixed(6)}, ${its.longitude.toFixed(6)}`;
  function grid(utm) {
    const zone = utm.zone === null ? "zone unknown" : `zone ${utm.zone} ${utm.is_south ? "south" : "north"}`;
    return `UTM ${utm.east_m.toFixed(1)} east, ${utm.north_m.toFixed(1)} north, ${zone}`;
  }
  function sureness(its) {
    if (its.confidence !== null) return percent(its.confidence);
    return its.pair_score === null ? "" : `score ${its.pair_score.toFixed(2)}`;
  }
  function verdict(content) {
    const { candidates: [best], position } = content;
    if (!best) return "No photo in the map meets the conditions";
    if (content.in_map === false) return "Not in this map";
    const where = !position ? `: ${best.path}` : position.latitude === null ? ` at ${grid(position.utm)}` : ` at ${degrees(position)}`;
    return (content.in_map ? "Found" : "Best match") + where;
  }
  function details(content) {
    const { candidates: [best], position, confidence } = content;
    if (!best) return "";
    const sure = confidence === null ? `Pair score ${best.pair_score?.toFixed(2) ?? "unknown"}; confidences need a calibration` : `${percent(confidence)} confident`;
    if (content.in_map === false) return `${sure}. The nearest look-alikes are below.`;
    const zone = position && position.latitude !== null && position.utm ? grid(position.utm) : null;
    return [sure, zone, position && (position.spread_m ? `spread of the photos that agree: ${metres(position.spread_m)}` : "estimated from one photo")].filter(Boolean).join(" · ");
  }

  function show(content, question) {
    if (asked?.preview) URL.revokeObjectURL(asked.preview);
    for (const url of pictures.values()) url.then(URL.revokeObjectURL, () => {});
    pictures.clear();
    overlays.clear();
    answer = content;
    asked = { ...question, preview: question.file ? URL.createObjectURL(question.file) : null };
    byId("answer").hidden = false;
    byId("verdict").textContent = verdict(content);
    byId("details").textContent = details(content);
    byId("json").textContent = JSON.stringify(content, null, 2);
    byId("curl").textContent = curl(question);
    byId("candidates").replaceChildren(...content.candidates.map(card));
    byId("candidates-title").hidden = !content.candidates.length;
    select(content.candidates[0] ?? null);
    drawMap();
  }
  function frame(source, name) {
    const box = element("div", { class: "frame" });
    const fail = (reason) => box.replaceChildren(element("div", { class: "gone" }, reason));
    const image = (url) => {
      const its = element("img", { src: url, alt: name, decoding: "async" });
      its.addEventListener("error", () => fail("This browser can't show this kind of picture."));
      box.prepend(its);
    };
    if (source === null) fail("no picture");
    else if (typeof source === "string") image(source);
    else source.then(image, (error) => fail(error.message));
    return box;
  }
  function pictureOf(candidate) {
    const address = candidate.photo.replace(/^\//, "");
    if (!pictures.has(address)) pictures.set(address, request(address).then((its) => its.blob()).then((its) => URL.createObjectURL(its)));
    return pictures.get(address);
  }
  const source = (candidate) => (indices.length > 1 ? `${candidate.index}: ${candidate.path}` : candidate.path);
  function card(candidate) {
    const button = element(
      "button", { type: "button", "aria-pressed": "false" }, frame(pictureOf(candidate), ""),
      element("span", { class: "numbers" }, element("span", { class: "rank" }, `${candidate.rank}`), element("span", {}, sureness(candidate))),
      element("span", { class: "path", title: source(candidate) }, source(candidate)),
    );
    button.addEventListener("click", () => select(candidate));
    return element("li", {}, button);
  }

  function select(candidate) {
    selected = candidate;
    [...byId("candidates").children].forEach((item, place) => {
      item.firstChild.setAttribute("aria-pressed", String(answer.candidates[place] === candidate));
    });
    const [query, photo] = [frame(asked.preview ?? asked.thumbnail, asked.name), candidate && frame(pictureOf(candidate), candidate.path)];
    const facts = candidate && [
      candidate.latitude === null ? candidate.utm && grid(candidate.utm) : degrees(candidate),
      candidate.heading_deg === null ? null : `looks towards ${candidate.heading_deg.toFixed(0)}°`,
    ].filter(Boolean).join(" · ");
    byId("pair").replaceChildren(
      element("figure", { class: "photo" }, query, element("figcaption", {}, "Your photo", element("div", { class: "path", title: asked.name }, asked.name))),
      candidate ? element(
        "figure", { class: "photo" }, photo,
        element("figcaption", {}, element("span", { class: "numbers" }, element("span", {}, `Candidate ${candidate.rank}`), element("span", {}, sureness(candidate))),
          element("div", { class: "path", title: source(candidate) }, source(candidate)), element("div", { class: "path" }, facts))) : "",
    );
    byId("why").disabled = !candidate || !asked.file;
    byId("why-note").textContent = candidate && !asked.file ? "Drop the photo again to see why." : "";
    showWhy(false);
    map?.repaint();
  }
  function move(step) {
    const places = answer.candidates.length;
    if (!places) return;
    const next = Math.min(places - 1, Math.max(0, answer.candidates.indexOf(selected) + step));
    select(answer.candidates[next]);
    byId("candidates").children[next].firstChild.focus();
  }
  function listenToAnswer() {
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !answer || byId("token-dialog").open) return;
      if (/^(INPUT|SELECT|TEXTAREA|CANVAS|PRE)$/.test(event.target.tagName)) return;
      const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); move(step); }
    });
    byId("why").addEventListener("click", () => showWhy(byId("why").getAttribute("aria-pressed") === "false"));
  }

  // ---- why ----
  async function showWhy(wanted) {
    const button = byId("why"), pair = byId("pair"), candidate = selected, its = asked;
    button.setAttribute("aria-pressed", String(wanted));
    pair.classList.toggle("attention", wanted);
    if (!wanted) return;
    byId("why-note").textContent = "Looking …";
    if (!overlays.has(candidate)) {
      const query = new URLSearchParams({ photo_id: candidate.photo_id, index: candidate.index });
      const named = new URLSearchParams(candidate.photo.split("?")[1]);
      for (const key of ["generation", "of"]) if (named.has(key)) query.set(key, named.get(key));
      overlays.set(candidate, request(`v1/why?${query}`, { body: its.file, type: its.type }).then((response) => response.json()));
    }
    let found;
    try {
      found = await overlays.get(candidate);
    } catch (error) {
      overlays.delete(candidate);
      if (candidate === selected && its === asked) { showWhy(false); byId("why-note").textContent = error.message; }
      return;
    }
    if (candidate !== selected || its !== asked || pair.querySelector(".heat")) return;
    const frames = pair.querySelectorAll(".frame");
    for (const [place, heat] of [found.query, found.photo].entries()) frames[place].append(element("img", { class: "heat", src: heat, alt: "" }));
    byId("why-note").textContent = "Yellow is where the network looked when it compared the two photos.";
  }

  // ---- map ----
  const EARTH_RADIUS_M = 6378137;
  let map = null;
  let ground = null; // what the map shows: places in metres from the first candidate

  // Metres from a place: of degrees if all have them, else in the UTM zone that the best candidate is in.
  function projection(candidates) {
    const located = candidates.filter((its) => its.latitude !== null);
    if (located.length) {
      const [{ latitude, longitude }] = located;
      const scale = (EARTH_RADIUS_M * Math.PI) / 180, narrow = Math.cos((latitude * Math.PI) / 180);
      const across = (degrees) => ((((degrees + 180) % 360) + 360) % 360) - 180; // the date line is no edge
      return (its) => (its.latitude === null ? null : [across(its.longitude - longitude) * narrow * scale, (its.latitude - latitude) * scale]);
    }
    const first = candidates.find((its) => its.utm !== null);
    if (!first) return null;
    return (its) => (its.utm === null || (its.index ?? first.index) !== first.index ? null : [its.utm.east_m - first.utm.east_m, its.utm.north_m - first.utm.north_m]);
  }
  function drawMap() {
    const project = projection(answer.candidates);
    byId("map-box").parentElement.hidden = !project;
    if (!project) { ground = null; return; }
    const query = new URLSearchParams(asked.query);
    const [latitude, longitude] = (query.get("near") ?? "").split(",").map(Number);
    ground = {
      candidates: answer.candidates.map(project),
      estimate: answer.position && project(answer.position), spread: answer.position?.spread_m ?? null,
      near: query.has("near") ? project({ latitude, longitude, utm: null }) : null, radius: Number(query.get("radius_m")),
    };
    const left = ground.candidates.filter((its) => !its).length;
    byId("map-note").textContent = left ? `${left} ${left === 1 ? "candidate has" : "candidates have"} no position on this map.` : "";
    legend();
    map ??= createMap({ box: byId("map-box"), paint, hover: (x, y) => map.canvas.classList.toggle("over", nearest(x, y) !== null), click });
    map.show([...ground.candidates, ground.estimate], 1);
  }
  function paint(context, colour) {
    if (!ground) return;
    if (ground.near) circle(context, ground.near, ground.radius, colour.soft, [4, 3]);
    ground.candidates.forEach((at, number) => { if (at) heading(context, at, answer.candidates[number].heading_deg, colour.soft); });
    for (let number = ground.candidates.length - 1; number >= 0; number -= 1) marker(context, number, colour);
    if (!ground.estimate) return;
    if (ground.spread) circle(context, ground.estimate, ground.spread, colour.third, []);
    const [x, y] = [map.toX(ground.estimate), map.toY(ground.estimate)];
    context.beginPath();
    context.moveTo(x, y - 18); context.lineTo(x + 18, y); context.lineTo(x, y + 18); context.lineTo(x - 18, y);
    context.closePath();
    context.lineWidth = 2.5;
    context.strokeStyle = colour.third;
    context.stroke();
  }
  function circle(context, at, radius, colour, dash) {
    context.beginPath();
    context.arc(map.toX(at), map.toY(at), radius * map.view.zoom, 0, 7);
    context.setLineDash(dash);
    context.lineWidth = 1.5;
    context.strokeStyle = colour;
    context.stroke();
    context.setLineDash([]);
  }
  function heading(context, at, degrees, colour) {
    if (degrees === null) return;
    const [x, y] = [map.toX(at), map.toY(at)];
    const angle = ((degrees - 90) * Math.PI) / 180;
    context.beginPath();
    context.moveTo(x, y);
    context.arc(x, y, 26, angle - 0.35, angle + 0.35);
    context.closePath();
    context.globalAlpha = 0.3;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = 1;
  }
  function marker(context, number, colour) {
    const at = ground.candidates[number];
    if (!at) return;
    const [x, y] = [map.toX(at), map.toY(at)];
    context.beginPath();
    context.arc(x, y, 10, 0, 7);
    context.fillStyle = number ? colour.panel : colour.right;
    context.fill();
    context.lineWidth = answer.candidates[number] === selected ? 3 : 1.5;
    context.strokeStyle = answer.candidates[number] === selected ? colour.ink : number ? colour.soft : colour.right;
    context.stroke();
    context.fillStyle = number ? colour.ink : colour.panel;
    context.font = "600 11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(String(number + 1), x, y + 0.5);
  }
  function nearest(x, y) {
    let best = null, least = 14;
    ground?.candidates.forEach((at, number) => {
      const apart = at ? Math.hypot(map.toX(at) - x, map.toY(at) - y) : Infinity;
      if (apart < least) { best = number; least = apart; }
    });
    return best;
  }
  function click(x, y) {
    const found = nearest(x, y);
    if (found !== null) select(answer.candidates[found]);
  }
  function legend() {
    const rows = [
      ["The best candidate", shape("circle", { cx: 13, cy: 7, r: 6, class: "best" })],
      ["The others, by rank", shape("circle", { cx: 13, cy: 7, r: 6, class: "other" })],
      ground.estimate && ["Estimated position and its spread", shape("path", { d: "M13 1l6 6-6 6-6-6z", class: "estimate" })],
      ground.near && ["Where you asked", shape("circle", { cx: 13, cy: 7, r: 6, class: "near" })],
    ];
    byId("map-legend").replaceChildren(...rows.filter(Boolean).map(([label, its]) => element("span", {}, sample(its), label)));
  }

  // ---- the same question elsewhere ----
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // one word of a shell, whatever is in it
  function curl(question) {
    const address = new URL("v1/locate", location.href).href + (question.query ? `?${question.query}` : "");
    const words = ["curl", "--data-binary", quoted(`@${question.name}`), "-H", quoted(`Content-Type: ${question.type}`)];
    if (sessionStorage.getItem(TOKEN)) words.push("-H", quoted("Authorization: Bearer TOKEN"));
    return [...words, quoted(address)].join(" ");
  }

  // ---- recent questions, which only this browser knows ----
  function recents() {
    try {
      const found = JSON.parse(localStorage.getItem(RECENT));
      return Array.isArray(found) ? found : [];
    } catch { return []; }
  }
  function remember(question, content) {
    const kept = [{ question, content, at: Date.now() }, ...recents()].slice(0, MOST_RECENT);
    while (kept.length) {
      try { localStorage.setItem(RECENT, JSON.stringify(kept)); break; } catch { kept.pop(); } // no room, or no storage at all
    }
    showRecents();
  }
  function showRecents() {
    const found = recents();
    byId("recent").hidden = !found.length;
    byId("recents").replaceChildren(...found.map(({ question, content, at }) => {
      const button = element(
        "button", { type: "button" }, frame(question.thumbnail, ""),
        element("div", { class: "path", title: question.name }, question.name),
        element("div", { class: "meta" }, new Date(at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })),
      );
      button.addEventListener("click", () => {
        complain("");
        show(content, { ...question, file: null });
        latest = null;
        byId("again").disabled = true;
        byId("answer").focus({ preventScroll: true });
        byId("answer").scrollIntoView({ block: "start" });
      });
      return element("li", {}, button);
    }));
  }
  // A small picture of a file as a data: URL, null where the browser can't read it.
  async function thumbnail(file) {
    try {
      const image = await createImageBitmap(file);
      const scale = Math.min(1, 320 / Math.max(image.width, image.height));
      const canvas = element("canvas", { width: Math.max(1, Math.round(scale * image.width)), height: Math.max(1, Math.round(scale * image.height)) });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      image.close();
      return canvas.toDataURL("image/webp", 0.7);
    } catch { return null; }
  }
  function listenToRecents() {
    byId("forget").addEventListener("click", () => {
      localStorage.removeItem(RECENT);
      showRecents();
      say("Forgotten.");
      byId("choose").focus();
    });
    showRecents();
  }

  listenToToken();
  listenToPhotos();
  listenToAnswer();
  listenToRecents();
  readIndices();
})();
