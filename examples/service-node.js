// The service of the example service-node.
//
//     POST /digest            says the SHA-256 of the body
//     GET /countdown/NUMBER   counts down to 1, ten lines a second

"use strict";

const crypto = require("crypto");
const http = require("http");

const manifest = {
  name: "digest",
  version: "1",
  routes: [
    { method: "POST", url_pattern: "/digest", handler: "digest" },
    { method: "GET", url_pattern: "/countdown/{number:[0-9]{1,3}}", handler: "countdown" },
  ],
};

function sendText(response, status, text) {
  response.statusCode = status;
  response.setHeader("Content-Type", "text/plain; charset=utf-8");
  response.end(text);
}

// By what Kapow! calls them in the header Kapow-Handler. A client cannot send
// that header, nor those with what the URL holds.
const handlers = {
  digest(request, response) {
    const hash = crypto.createHash("sha256");
    request.on("data", (data) => hash.update(data));
    request.on("end", () => sendText(response, 200, hash.digest("hex") + "\n"));
    // A body that breaks off has no end: there is nobody left to be told.
  },

  countdown(request, response) {
    let number = parseInt(request.headers["kapow-match-number"], 10);
    response.setHeader("Content-Type", "text/plain; charset=utf-8");
    const timer = setInterval(() => {
      if (number > 0) {
        response.write(`${number--}\n`);
      } else {
        response.end();
      }
    }, 100);
    // At its end, or when the client has left.
    response.on("close", () => clearInterval(timer));
  },
};

const server = http.createServer((request, response) => {
  const name = request.headers["kapow-handler"];
  if (Object.hasOwn(handlers, name)) {
    handlers[name](request, response);
  } else if (name === undefined && request.url === "/_kapow/manifest") {
    response.setHeader("Content-Type", "application/json");
    response.end(JSON.stringify(manifest));
  } else {
    sendText(response, 404, "There is no such handler.\n");
  }
});

server.requestTimeout = 0; // a body may take as long as Kapow! lets it
server.listen(process.env.KAPOW_SERVICE_SOCKET);
