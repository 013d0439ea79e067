// Shows the API, and tries it as whoever is logged in.
const place = document.getElementById("api");
const page = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const turn = () => page.classList.toggle("dark-mode", page.dataset.theme === "dark" || (page.dataset.theme === "system" && dark.matches));

turn();
dark.addEventListener("change", turn);

SwaggerUIBundle({
  url: "/openapi.json",
  domNode: place,
  deepLinking: true,
  displayRequestDuration: true,
  filter: true,
  requestInterceptor: (request) => {
    if (place.dataset.token) request.headers["X-CSRF-Token"] = place.dataset.token;
    return request;
  },
});
