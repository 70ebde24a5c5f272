// What the scripts of both pages (a report's, the service's) build with. Texts are set as text, never parsed as HTML.
"use strict";
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// A sample of what a map's legend names.
function sample(...shapes) {
  const made = shape("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" });
  made.append(...shapes);
  return made;
}

const metres = (value) => (value === null ? "" : value < 1000 ? `${value.toFixed(1)} m` : `${(value / 1000).toFixed(1)} km`);
